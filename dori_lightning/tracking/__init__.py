"""Say how a run goes while it goes: numbers, pictures and files for the loggers of a run.

Everything lies in the run folder as well; no result is read from here.
"""
