/* A whole layer of the model for one new token of each row, in one parallel region of nine phases:

    a = LN(x); q, k, v = a W; c = attention(q, keys, values); h = alpha a + c W; m = LN(h);
    u, g = m W; out = alpha m + (u GELU(g)) W

Everything is rounded to the dtype of the model where torch rounds it. */

enum { QUERY_KEY_VALUE, DENSE, UP, DOWN, NUM_LINEARS };
enum { NUM_PHASES = 9 };

struct layer_job {
    const struct layer *layer;
    const struct functions *functions;
    struct job linears[NUM_LINEARS];
    int64_t hidden, inner, item_size, scratch_size;
    float *normed /* (M, hidden) */, *scratch /* of each thread */;
    void *qkv, *context, *attended, *up, *gated;
    struct phase phases[NUM_PHASES];
};

static void read_token(void *context, int64_t token, int64_t thread)
{
    const struct layer_job *job = context;
    const struct layer *layer = job->layer;
    float *row = job->normed + token * job->hidden;
    (void)thread;
    load_row(row, layer->x, layer->dtype, token * job->hidden, job->hidden);
    job->functions->normalize(
        row, job->hidden, layer->norm_weights[0], layer->norm_biases[0], layer->norm_dtype, layer->eps[0], layer->dtype);
    job->functions->round_token(&job->linears[QUERY_KEY_VALUE], token);
}

static void project(void *context, int64_t unit, int64_t thread)
{
    const struct job *linear = &((const struct layer_job *)context)->linears[QUERY_KEY_VALUE];
    (void)thread;
    multiply_block(linear, block_of(linear, unit));
}

static void attend_head(void *context, int64_t unit, int64_t thread)
{
    const struct layer_job *job = context;
    const int64_t num_heads = job->layer->num_heads;
    job->functions->attend(
        job->layer, job->qkv, job->context, unit / num_heads, unit % num_heads,
        job->scratch + thread * job->scratch_size);
}

static void round_context(void *context, int64_t token, int64_t thread)
{
    const struct layer_job *job = context;
    (void)thread;
    job->functions->round_token(&job->linears[DENSE], token);
}

static void project_context(void *context, int64_t unit, int64_t thread)
{
    const struct job *linear = &((const struct layer_job *)context)->linears[DENSE];
    (void)thread;
    multiply_block(linear, block_of(linear, unit));
}

static void add_and_norm(void *context, int64_t token, int64_t thread)
{
    const struct layer_job *job = context;
    const struct layer *layer = job->layer;
    const int64_t start = token * job->hidden;
    float *row = job->normed + start;
    (void)thread;
    job->functions->add_residual(job->attended, row, layer->alpha, layer->dtype, start, job->hidden);
    load_row(row, job->attended, layer->dtype, start, job->hidden);
    job->functions->normalize(
        row, job->hidden, layer->norm_weights[1], layer->norm_biases[1], layer->norm_dtype, layer->eps[1], layer->dtype);
    job->functions->round_token(&job->linears[UP], token);
}

static void project_up(void *context, int64_t unit, int64_t thread)
{
    const struct layer_job *job = context;
    const struct job *linear = &job->linears[UP];
    const struct block block = block_of(linear, unit);
    (void)thread;
    multiply_block(linear, block);
    multiply_block(linear, (struct block){block.row + job->inner, block.rows, block.token, block.tokens});
    for (int64_t token = block.token; token < block.token + block.tokens; token++) {
        const char *values = (char *)job->up + (2 * token * job->inner + block.row) * job->item_size;
        job->functions->gate(
            (char *)job->gated + (token * job->inner + block.row) * job->item_size, values,
            values + job->inner * job->item_size, job->layer->dtype, block.rows);
    }
}

static void round_gated(void *context, int64_t token, int64_t thread)
{
    const struct layer_job *job = context;
    (void)thread;
    job->functions->round_token(&job->linears[DOWN], token);
}

static void project_down(void *context, int64_t unit, int64_t thread)
{
    const struct layer_job *job = context;
    const struct job *linear = &job->linears[DOWN];
    const struct block block = block_of(linear, unit);
    (void)thread;
    multiply_block(linear, block);
    for (int64_t token = block.token; token < block.token + block.tokens; token++) {
        const int64_t start = token * job->hidden + block.row;
        job->functions->add_residual(
            linear->out, job->normed + start, job->layer->alpha, job->layer->dtype, start, block.rows);
    }
}

static void work_on_layer(int64_t begin, int64_t end, void *context)
{
    struct layer_job *job = context;
    const int64_t num_tokens = job->layer->num_tokens;
    const struct { int64_t num_units; unit_function run; } phases[NUM_PHASES] = {
        {num_tokens, read_token},
        {num_blocks(&job->linears[QUERY_KEY_VALUE]), project},
        {num_tokens * job->layer->num_heads, attend_head},
        {num_tokens, round_context},
        {num_blocks(&job->linears[DENSE]), project_context},
        {num_tokens, add_and_norm},
        {num_blocks(&job->linears[UP]), project_up},
        {num_tokens, round_gated},
        {num_blocks(&job->linears[DOWN]), project_down},
    };
    (void)end;
    for (int i = 0; i < NUM_PHASES; i++)
        run_phase(&job->phases[i], phases[i].num_units, phases[i].run, job, begin);
}

static int64_t aligned(int64_t size)
{
    return (size + 63) / 64 * 64;
}

/* Write a layer's output for one new token of each row, and its keys and values; return 0 if memory is short. */
static int decode_layer(const struct layer *layer, parallel_for_function parallel_for)
{
    enum { PADDING = 64 };
    const int64_t M = layer->num_tokens, hidden = layer->num_heads * layer->head_size;
    struct layer_job job = {
        .layer = layer, .functions = LEVELS[layer->level], .hidden = hidden, .inner = layer->down.num_columns,
        .item_size = layer->dtype == FLOAT32 ? 4 : 2,
        .scratch_size = aligned(4 * (layer->head_size + PADDING) + layer->length + PADDING)};
    const struct linear *linears[] = {&layer->query_key_value, &layer->dense, &layer->up, &layer->down};
    int64_t columns = 0;
    for (int i = 0; i < NUM_LINEARS; i++) {
        const int is_normed = i == QUERY_KEY_VALUE || i == UP;
        job.linears[i] = job_of(
            linears[i], NULL, is_normed ? FLOAT32 : layer->dtype, NULL, layer->dtype, M, layer->level,
            layer->num_threads);
        const int64_t bytes = aligned(column_bytes(&job.linears[i]));
        columns = bytes > columns ? bytes : columns;
    }
    job.linears[UP].num_unit_rows = job.inner; /* each with its gate */
    const int64_t normed = aligned(M * hidden * 4), states = aligned(M * hidden * job.item_size);
    const int64_t inner = aligned(M * job.inner * job.item_size), scratch = 4 * job.scratch_size * layer->num_threads;
    char *memory = aligned_alloc(64, columns + normed + 5 * states + 3 * inner + aligned(scratch)), *next = memory;
    if (!memory)
        return 0;
    for (int i = 0; i < NUM_LINEARS; i++) /* one after another in the same place */
        place_columns(&job.linears[i], next);
    job.normed = (float *)(next += columns);
    job.qkv = next += normed;
    job.context = next += 3 * states; /* at least what the three take */
    job.attended = next += states;
    job.up = next += states;
    job.gated = next += 2 * inner;
    job.scratch = (float *)(next += inner);
    job.linears[QUERY_KEY_VALUE].source = job.normed, job.linears[QUERY_KEY_VALUE].out = job.qkv;
    job.linears[DENSE].source = job.context, job.linears[DENSE].out = job.attended;
    job.linears[UP].source = job.normed, job.linears[UP].out = job.up;
    job.linears[DOWN].source = job.gated, job.linears[DOWN].out = layer->out;
    if (layer->num_threads == 1)
        work_on_layer(0, 1, &job);
    else
        parallel_for(0, layer->num_threads, 1, work_on_layer, &job);
    free(memory);
    return 1;
}

/* Do so for layers, one after another. */
EXPORT int glm_decode_layers(const struct layer *layers, int64_t num_layers, parallel_for_function parallel_for)
{
    for (int64_t i = 0; i < num_layers; i++)
        if (!decode_layer(&layers[i], parallel_for))
            return 0;
    return 1;
}
