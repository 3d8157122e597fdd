"""A whole cluster in one thread under a virtual clock: everything that decides is production code, the rest is seeded.

    clock.py      time, and what happens when
    oracle.py     a model whose every token depends on every byte of KV it reads
    control.py    wires between ranks and router: in order, but they can be cut
    kv.py         KV frames between ranks: dropped, doubled, reordered, late, flipped
    device.py     what computes, in the order of what was launched
    group.py      one group of ranks: joins, serves, dies, comes back as a stranger
    cluster.py    the router's mind, its clients, and all groups together
    small_world.py, small_life.py, search.py, copies.py   the other way: two or three requests, every order of events
    planting.py   mistakes that some seed must find; plants.py, those that small worlds must find too
    scenario.py   one seed -> a topology, requests and faults; what must hold whatever happens

`python -m tests.simulation.scenario SEED` tells the story of one seed, event by event.
"""
