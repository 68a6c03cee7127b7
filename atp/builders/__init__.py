"""Builders: what :mod:`atp.build` offers, by what is built."""
