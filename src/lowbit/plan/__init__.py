"""Know before: what a model costs on a machine, and which formats to choose.

network.py                   sizes from a config.json            memory.py    bytes
work.py, fit.py, profile.py  a measured machine, part by part    machine.py   seconds from its profile
devices.py, device.py        published devices: rooflines        cost.py      steps, prompts, tokens
interval.py, calibrate.py    how wrong predictions may be        accuracy.py  what formats lose
budget.py, choose.py         limits, and the integer program     planner.py   plans; report.py says them
billing.py, footprint.py     joules, carbon, water, money        views.py     what explains
cluster.py, serving.py, ..   a load on simulated machines
"""
