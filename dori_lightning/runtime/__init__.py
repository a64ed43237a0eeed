"""What every layer stands on: processes, signals, logs, files, seeds."""
