/* Threads that take units of work, phase after phase, within one parallel region.

A thread that finds no unit left waits until all units of the phase are done, not for other threads to come: where
fewer threads run than were asked for, or one at a time, those that run do everything. */

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

enum { SPINS = 4096 /* some microseconds, then the processor is left to others */ };

typedef void (*range_function)(int64_t begin, int64_t end, void *context);
typedef int32_t (*parallel_for_function)(int64_t begin, int64_t end, int64_t grain, range_function, void *context);
typedef void (*unit_function)(void *context, int64_t unit, int64_t thread);

struct phase {
    _Alignas(64) atomic_llong next; /* in cache lines of their own */
    _Alignas(64) atomic_llong done;
};

static void run_phase(struct phase *phase, int64_t num_units, unit_function run, void *context, int64_t thread)
{
    int64_t unit;
    while ((unit = atomic_fetch_add_explicit(&phase->next, 1, memory_order_relaxed)) < num_units) {
        run(context, unit, thread);
        atomic_fetch_add_explicit(&phase->done, 1, memory_order_release);
    }
    for (int spins = 0; atomic_load_explicit(&phase->done, memory_order_acquire) < num_units; spins++) {
        if (spins >= SPINS)
            sched_yield();
#if defined(__x86_64__)
        else
            __builtin_ia32_pause();
#endif
    }
}
