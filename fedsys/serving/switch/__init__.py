"""Which variant of a portfolio answers, and how it changes without losing a request.

`policy` decides as a pure function of what `signals` saw, `relief` for the next batch alone;
`switcher` loads beside, swaps, drains and frees; `control` is the loop around them.
"""
