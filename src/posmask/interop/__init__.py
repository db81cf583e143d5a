"""Conversion from and to the formats of other tools. Only this package uses their names for sites and tensors."""
