"""The stages, in the order in which they run; `jahubert.train.experiment.registry.STAGES` lists them.

A stage is a module with `VERSION` (raised when its result changes), a frozen `Config` whose defaults are
the paper's, and `run(config, out) -> metrics`. It reads only what its config names, writes only under
`out`, and draws randomness only from `config.seed`. A stage with `KEEP = False` is cheap and runs anew; one
with `kept(config, out)` has something to say of a result that is there already.
"""
