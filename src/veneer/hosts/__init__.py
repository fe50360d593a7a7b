"""Hosts: one module per family of models, which lists the sites that methods can adapt."""
