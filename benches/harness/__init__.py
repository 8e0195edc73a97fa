"""What the scripts under benches share: the program under test, virtual environments, figures."""
