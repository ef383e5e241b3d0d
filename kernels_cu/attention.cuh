// attention.cuh: the defines that all attention kernels take, and options that are off by default.

#if !defined(HEAD_DIM) || !defined(Q_T) || !defined(K_T) || !defined(SCALE_T) || !defined(BLOCK)
#error "attention.cuh needs HEAD_DIM, Q_T, K_T, SCALE_T and BLOCK"
#endif
#ifndef LOGITS_SOFT_CAP
#define LOGITS_SOFT_CAP 0
#endif
#ifndef ALIBI
#define ALIBI 0
#endif
#ifndef SINKS
#define SINKS 0
#endif
#ifndef TREE
#define TREE 0
#endif
#ifndef POSITIONS
#define POSITIONS 0
#endif
