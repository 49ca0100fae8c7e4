"""Everything that touches the terminal. Import the modules: prompt_toolkit and rich are slow, and few need both."""
