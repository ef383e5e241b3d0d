"""What the kernels that do many things in one launch are made of; the ops that launch them are
`ops.phase_program`, `ops.resident_program` and `ops.mailbox`.

    phases              the phases of a model's step: products, norms, attention, argmax
    draw_phases         those that draw tokens
    stages              which phases must wait for which
    resident_tokens     one launch for many tokens: its inputs and results
    resident_commands   what the host tells it meanwhile: more tokens, pages, stop or start a row
    host_rings          rings in pinned memory between the host and a kernel that stays
"""
