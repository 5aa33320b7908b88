"""Exports: a plan as artefacts that other tools load, each with a certificate."""
