"""Runs: from a configuration to a finished run directory, in stages that can be resumed.

Takes a composed configuration and calls every other room with plain arguments; gives the run directory. With
:mod:`atp.commands` it is the only reader of the configuration. How anything is done is known below it.

::

    conf/ + command line -> TrainConfig -> parts: base, tokenizer, data, masked model, trainer
                                             |
    stage        what it does                v                         what it leaves
    fit          start, repair, joint steps; masks freeze and cut      checkpoints/joint.ckpt
    export       removal, files; masked == removed == reloaded?        masks.json, pruned/
    dense        scores the base on the test records
    pruned       scores the export on them
    dense_lora   tunes the base without masks, scores it
    <baseline>   cuts the base at once, repairs, tunes, scores it
    samples      continues a few test prompts                          samples.json
    cost         size, memory and speed of base and export
                                             |
                                             v
    stages/<stage>.json -> metrics.json, model card -> report.html

A stage whose result is there is not done again, so a run goes on where it stopped.
"""
