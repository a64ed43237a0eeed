"""What an audit found, as files, tables, figures and one page for people."""
