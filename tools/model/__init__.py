"""An explicit-state model checker for ownership: the real rules, an adversary, and every interleaving of both.

`ownership.state.apply`, `rules.decide`, `recovery.plan`, `wire.phases.next_phase` and the bytes of
`engine.journal_format` are imported, never copied. Around them stands a model of what the daemons do between two
decisions (`daemon`), of what outlives them (`world`: disks, guest processes, messages under way) and of everything that
breaks (`adversary`).
`explore` visits every state within a number of failures; `promises` says what must hold; `mutations` are deliberate
bugs, each of which the model has to find.

    python -m tools.model --chain ab --failures 2
"""
