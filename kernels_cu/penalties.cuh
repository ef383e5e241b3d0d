// penalties.cuh: the logit of a token that prompt or answer have; of adjust_logits.cu and phase_draw.cuh.

// `tally` is twice the token's count in the answer, + 1 where the prompt has it; `penalties` are
// repetition, presence and frequency.
__device__ __forceinline__ float penalised(float logit, int tally, const float* penalties) {
    const float repetition = penalties[0], presence = penalties[1], frequency = penalties[2];
    logit = logit > 0.0f ? __fdiv_rn(logit, repetition) : __fmul_rn(logit, repetition);
    const int count = tally >> 1;
    if (count <= 0) return logit;
    return __fsub_rn(logit, __fadd_rn(presence, __fmul_rn(frequency, (float)count)));
}
