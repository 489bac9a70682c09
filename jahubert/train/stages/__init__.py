"""The stages of the pipeline, one module per stage; `experiment.registry.STAGES` lists them in order.

Each stage defines `VERSION` (increased when its result changes), a frozen dataclass `Config`, and
`run(config, out) -> metrics`. A stage only reads inputs given in its config, only writes to `out`, and
derives all random numbers from `config.seed`. A stage with `KEEP = False` runs every time. For other stages,
a finished result is kept, and `kept(config, out)` is called if the stage defines this function.
"""
