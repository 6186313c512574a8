"""How large a model is, and what training it takes: parameters, layouts, memory, disk. Pure but for reading shapes.

docs/sizing.md has the formulas with their sources, and what was compared with what.
"""
