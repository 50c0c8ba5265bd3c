"""What the command line does besides its commands: showing progress, and ending when it is interrupted."""
