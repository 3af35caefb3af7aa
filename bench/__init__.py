"""What this project measures, and the ledger of results."""
