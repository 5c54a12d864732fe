import click


@click.command("shard")
def command():
    """(being written)"""
