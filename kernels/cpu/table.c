/* The table of operations of one instruction set.
 * Refuses to link where an operation is missing. */
#include "kernels/cpu/cpu.h"

const cpl_ops CPL_CPU(ops) = {
#define CPL_OP(name, parameters) .name = CPL_CPU(name),
#include "kernels/ops.def"
#undef CPL_OP
};
