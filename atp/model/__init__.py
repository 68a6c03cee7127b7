"""Models: what families are called, widths per layer, and the modeling file for layers of different width.

Takes a Hugging Face config and the widths of every layer; gives the config and the model of those widths, in a stock
class where one can hold them. It knows nothing of units, masks or why a layer is narrow.
"""
