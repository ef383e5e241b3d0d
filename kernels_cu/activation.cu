// activation.cu: gated activations, residual add and embedding rows.
//
// Arrays, row-major, last dimension contiguous (letters as in pykv/ops/activation.py):
//   swiglu, geglu   out            [T, F]    X_T; token stride out_stride elements; written, and
//                                            where `accumulate` is 1 also read and added to
//                   x       const  [T, 2F]   X_T, gate then up; token stride x_stride elements
//   add             x              [count]   X_T, updated in place, x += y
//                   y       const  [count]   X_T; may be x
//   embed           out            [T, E]    X_T
//                   table   const  [V, E]    TABLE_T
//                   ids     const  [T] int32; outside 0 .. V-1: a row of zeros
// Scalars:  scale, a factor of the rows of embed
// Defines:  X_T, TABLE_T = float, f16 or bf16; TABLE_T concerns embed alone; BLOCK = threads
// Launch:   block (BLOCK), eight elements a thread. swiglu, geglu: grid (T, F / (8 * BLOCK) rounded
//           up); embed: grid (T, E / (8 * BLOCK) rounded up); add: grid (count / (8 * BLOCK) rounded
//           up).
//           All but embed may start early, hence their arrays are not __restrict__; embed lets the
//           next kernel do so.
//           Arrays are 16-byte aligned, and so are the rows of x and out where F % 8 == 0
// Traffic:  swiglu, geglu 3 * T * F * sizeof(X_T); add 3 * count * sizeof(X_T);
//           embed T * E * (sizeof(X_T) + sizeof(TABLE_T)) bytes
// Order:    no atomics, no sums; add and embed round once, to nearest even
#include "gate.cuh"
#include "ptx.cuh"
#include "vector.cuh"

#if !defined(X_T) || !defined(TABLE_T) || !defined(BLOCK)
#error "activation.cu needs X_T, TABLE_T and BLOCK"
#endif

template <float (*ACTIVATION)(float)>
__device__ __forceinline__ void gate_row(X_T* out, const X_T* x, i64 x_stride, i64 out_stride, int F,
                                         int accumulate) {
    let_next_start();
    await_previous();
    const X_T* gate = x + blockIdx.x * x_stride;
    const X_T* up = gate + F;
    out += blockIdx.x * out_stride;
    const int first = (blockIdx.y * BLOCK + threadIdx.x) * 8;
    if (F % 8 == 0) {
        if (first >= F) return;
        float g[8], u[8], old[8] = {};
        load8(g, gate + first);
        load8(u, up + first);
        if (accumulate) load8(old, out + first);
#pragma unroll
        for (int i = 0; i < 8; i++) g[i] = fmaf(ACTIVATION(g[i]), u[i], old[i]);
        store8(out + first, g);
    } else {
        for (int i = first; i < min(first + 8, F); i++) {
            const float old = accumulate ? to_float(out[i]) : 0.0f;
            out[i] = from_float<X_T>(fmaf(ACTIVATION(to_float(gate[i])), to_float(up[i]), old));
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 8)
swiglu(X_T* out, const X_T* x, i64 x_stride, i64 out_stride, int F, int accumulate) {
    gate_row<silu>(out, x, x_stride, out_stride, F, accumulate);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 8)
geglu(X_T* out, const X_T* x, i64 x_stride, i64 out_stride, int F, int accumulate) {
    gate_row<gelu>(out, x, x_stride, out_stride, F, accumulate);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 8)
add(X_T* x, const X_T* y, i64 count) {
    let_next_start();
    await_previous();
    const i64 first = ((i64)blockIdx.x * BLOCK + threadIdx.x) * 8;
    if (first + 8 <= count) {
        float a[8], b[8];
        load8(a, x + first);
        load8(b, y + first);
#pragma unroll
        for (int i = 0; i < 8; i++) a[i] += b[i];
        store8(x + first, a);
    } else {
        for (i64 i = first; i < count; i++) x[i] = from_float<X_T>(to_float(x[i]) + to_float(y[i]));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 8)
embed(X_T* __restrict__ out, const TABLE_T* __restrict__ table, const int* __restrict__ ids,
      float scale, int V, int E) {
    let_next_start();
    const int id = ids[blockIdx.x];
    const bool known = id >= 0 && id < V;
    const TABLE_T* row = table + (i64)(known ? id : 0) * E;
    out += (i64)blockIdx.x * E;
    const int first = (blockIdx.y * BLOCK + threadIdx.x) * 8;
    if (E % 8 == 0) {
        if (first >= E) return;
        float x[8] = {};
        if (known) load8(x, row + first);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= scale;
        store8(out + first, x);
    } else {
        for (int i = first; i < min(first + 8, E); i++) {
            out[i] = from_float<X_T>(known ? to_float(row[i]) * scale : 0.0f);
        }
    }
}
