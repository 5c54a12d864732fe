import click


@click.command("synth")
def command():
    """(being written)"""
