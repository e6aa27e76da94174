"""What surrounds a run and is not the lesson: settings (= the command line), checks, report, results, identity."""
