"""The configuration: every option with its type, default and help, and the short names of classes.

Takes the YAML files of ``conf/`` and the command line, which Hydra composes onto the dataclasses of
:mod:`atp.config.schema`; gives a typed ``TrainConfig``, or names the key that is wrong and the nearest valid one. Only
:mod:`atp.run` and :mod:`atp.commands` read it. It does not know what an option does.
"""
