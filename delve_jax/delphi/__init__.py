"""Delphi: how a run is sized, where it will land, and what it will then score.

`recipe`: a budget of FLOPs -> configurations; `points`: files of finished runs; `fit`: optima and
laws; `forecast`: losses with intervals; `downstream`: benchmark scores; `plots`: pictures of these.
Numbers only: nothing here imports model code.
"""
