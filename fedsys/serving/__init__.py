"""Answering requests over HTTP, whatever computes the answers."""
