"""Pareto sets learned by scalarization, and trajectories on convex quadratics."""
