"""The convergence benchmark: how many training steps a child saves, by how its weights were made.

`arms` says what is compared, `tasks` on what, `settings` how long; `race` trains, `ledger` remembers, `figures`
computes, `report` writes.
"""
