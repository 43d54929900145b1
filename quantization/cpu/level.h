/* All functions for one instruction set. kernels.c defines VECTOR (bits of a vector), VNNI (whether its products of
integers are added in one step) and NAME, and has everything in here compiled for that instruction set. */

#include "rounding.h"
/* These need what has been defined there. */
#include "decode.h"
#include "products.h"
#include "rows.h"

static const struct functions NAME(functions) = {
    NAME(round_token), NAME(multiply), NAME(decode), NAME(normalize), NAME(attend), NAME(gate), NAME(add_residual)};
