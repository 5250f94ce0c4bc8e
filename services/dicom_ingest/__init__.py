"""dicom-ingest: finds CT series and their masks, judges them, and stores what can be scored."""
