"""`python -m nightmail` and the console script."""

from nightmail.cli import main

if __name__ == "__main__":
    main()
