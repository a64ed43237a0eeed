"""The steps of an audit: attack, generate, score, and what a mitigation costs."""
