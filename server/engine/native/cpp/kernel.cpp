// A decoder step, row by row: a row's result has the same bits whatever other rows are in the batch.
// kernel_build.py compiles this file with the headers beside it; kernel.py calls it and documents
// each function.
//
// T is float or bfloat16. Sums are float.
//
// Shapes: rows of one token each; H query heads over h key-value heads of size e; blocks of z
// positions. Tensors are contiguous unless there is a stride.

#if defined(__x86_64__) && !defined(__clang__)
// GCC 12 moves vectors of 8 bytes through MMX registers and leaves them in use: what divides on the
// x87 unit in this thread afterwards, such as NumPy's `//`, then gets NaN.
#pragma GCC target("no-mmx")
#endif

#include "attention.h"
#include "blocks.h"
#include "cached_kv.h"
#include "lora.h"
#include "product.h"
#include "product_int8.h"
#include "row_functions.h"

// Each function's address for each type, under a name that kernel.py finds: norm_float32.
#define EXPORT(name) auto* name##_float32 = &name<float>; auto* name##_bfloat16 = &name<bfloat16>;
extern "C" {
EXPORT(norm)
EXPORT(gate)
EXPORT(rotate)
EXPORT(store_kv)
EXPORT(attend)
EXPORT(add_lora)
EXPORT(product)
EXPORT(product_int8)
EXPORT(run_blocks)

// Whether the system lets this process use all that the kernel is built for.
int may_run() {
#ifdef __AMX_BF16__
    return may_use_amx();
#else
    return true;
#endif
}
}
