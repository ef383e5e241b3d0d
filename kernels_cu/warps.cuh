// warps.cuh: threads of a block, and its warps.
#include "types.cuh"

#ifndef BLOCK
#error "warps.cuh needs BLOCK"
#endif
constexpr int THREADS = BLOCK;
constexpr int WARPS = THREADS / WARP;
static_assert(THREADS % WARP == 0, "whole warps");
