"""The survey, sentence by sentence: the ledger's frame, the claims, what they share, and LEDGER.md."""
