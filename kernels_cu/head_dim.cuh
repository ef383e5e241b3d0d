// head_dim.cuh: elements of a head.
#ifndef HEAD_DIM
#error "head_dim.cuh needs HEAD_DIM"
#endif
constexpr int D = HEAD_DIM;
