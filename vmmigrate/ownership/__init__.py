"""Who owns a guest: journal records, what they add up to, and what may be decided from that. Pure functions.

`records` are the facts, `state.apply` adds one up, `rules.decide` answers an event with the records to append (or a
refusal), `recovery.plan` says what a restarted daemon does. The model checker imports these very functions.
"""
