"""What every optimizer of precond shares. Private: import nothing from here outside of precond."""
