"""The needs of a run on TPUs that are not rented yet; see docs/plan.md.

command       plans of one mesh, of the best ones, of several slices
abstract_run  the experiment of a run, of shapes alone
ahead, hlo    compiled for chips that nobody has; what such a program sends
roofline      memory, work and traffic of a step, counted
remat         what the backward pass may keep, by the memory of the devices that are here
chips         what a chip has and costs, which slices there are
tables        for the terminal
"""
