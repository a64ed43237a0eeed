"""What triggers share, told: record, answers, figures, tables and page of `task=locality`."""
