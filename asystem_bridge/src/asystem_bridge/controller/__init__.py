"""The single controller of ASystem (Ring-1T section 2.5): it decides, the workers compute."""
