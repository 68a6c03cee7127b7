"""Masks over a LoRA model: scores to gates, gates into the forward pass, and the budget they have to meet.

Takes the pruning space and a base model; gives a masked PEFT model, a generator of scores, a sampler of masks and a
budget term. It is the room that knows PEFT. It does not know data, optimisers or when masks freeze.

Where the masks of one decoder layer multiply (:class:`atp.space.units.Site`), each only if its kind is pruned::

    x -+- norm -+- q_proj --[1]-- rotary -+
       |        +- k_proj --[1]-- rotary -+- attention --[3]-- o_proj --[5]-- (+) -- x
       |        +- v_proj --[2]-----------+                                    |
       +-----------------------------------------------------------------------+

    x -+- norm -+- gate_proj -- act --+
       |        +- up_proj ----------(*)--[4]-- down_proj --[5]-- (+) -- x
       +-----------------------------------------------------------+

    [1] output of q_proj and k_proj  per rotary pair, the same in every head       qk_pairs
                                     per head, where a norm goes over all heads    heads, query_heads
    [2] output of v_proj             per KV head x value dimension; replaces [3]   heads, value_dims
                                     where no query heads are pruned
    [3] input of o_proj              per KV head x query head x value dimension    + query_heads
    [4] input of down_proj           per channel, a factor of the gated product    channels
    [5] output of o_proj, down_proj  per dimension of the residual stream          hidden
        and of the embedding

A projection is W x + (alpha / r) B A x: its input is masked before both terms, its output after their sum. ATP's
LoRA-aware pass has [5], and in place of the others masks the rows of W x alone in q, k, v, gate and up; adapters then
see all units.
"""
