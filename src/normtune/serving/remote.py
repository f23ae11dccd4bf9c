"""Images at http(s) URLs, where the server allows them: fetched from public addresses alone.

Scope: which addresses may be reached, a connection to the very address that was checked (a name that resolves anew
gains nothing), limits of size and time, no redirects, no proxies, no credentials. Non-scope: pixels (`uploads`).
Source: IANA's special-purpose address registries as `ipaddress` knows them, and what has been added to them since.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import httpx

from normtune.serving.limits import Held
from normtune.serving.uploads import Encoded, image_type, wrong

PORTS = {"http": 80, "https": 443}
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # all that has been given out so far
_SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        *("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"),  # the last: a cloud's own services
        *("2001::/23", "2002::/16", "3fff::/20"),  # Teredo and others, 6to4: IPv4 addresses in disguise; documentation
    )
]


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address belongs to the public internet; an IPv4-mapped one as the IPv4 address within."""
    found: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or found
    if isinstance(found, ipaddress.IPv6Address) and found not in _GLOBAL_V6:
        return False
    special = any(found in network for network in _SPECIAL if network.version == found.version)
    return found.is_global and not (found.is_multicast or found.is_reserved or special)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host; OSError where it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def fetch(url: str, param: str, limit: int, seconds: float, held: Held) -> Encoded:
    """The image file at `url`, of `limit` bytes at most, within `seconds` for everything.

    Raises:
        ApiError: 400 for any other URL than http(s) on its usual port, a host with an address that is not public,
            an answer other than 200, too many bytes, a type that is no image's, too slow; 429 by `held`.
    """
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise wrong("The image's URL cannot be read.", param) from error
    if target.scheme not in PORTS or not target.host or target.userinfo:
        raise wrong("The image's URL must be a data URL, or http(s) without credentials.", param)
    port = PORTS[target.scheme]
    if target.port not in (None, port):
        raise wrong(f"The image's URL must not name another port than {port}.", param)
    try:
        async with asyncio.timeout(seconds):
            address = await _public(target, port, param)
            return await _fetch(target, target.copy_with(host=address, port=port), param, limit, held)
    except TimeoutError as error:
        raise wrong(f"The image did not come within {seconds:g} seconds.", param) from error
    except (httpx.HTTPError, OSError, UnicodeError) as error:
        raise wrong(f"The image cannot be fetched ({type(error).__name__}).", param) from error


async def _public(target: httpx.URL, port: int, param: str) -> str:
    """The address to connect to; all of the host's must be public, for which one is used is chance."""
    addresses = await resolve(target.raw_host.decode("ascii").strip("[]"), port)
    if not addresses or not all(is_public(address) for address in addresses):
        raise wrong("The image's host has an address that is not public.", param)
    return addresses[0]


async def _fetch(target: httpx.URL, checked: httpx.URL, param: str, limit: int, held: Held) -> Encoded:
    """Asks for `target` at `checked`, the same with an address for its host. The certificate is checked against the
    URL's name, not against the address."""
    headers = {"Host": target.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"}
    names = {"sni_hostname": target.raw_host.decode("ascii")}
    async with (
        httpx.AsyncClient(trust_env=False, follow_redirects=False) as client,
        client.stream("GET", checked, headers=headers, extensions=names) as answer,
    ):
        if answer.status_code != 200:
            raise wrong(f"The image's server answered {answer.status_code}; redirects are not followed.", param)
        kind = image_type(answer.headers.get("Content-Type", ""), param)
        parts, size = [], 0
        async for chunk in answer.aiter_raw():
            size += len(chunk)
            if size > limit:
                raise wrong(f"The image has more than {limit:,} bytes.", param)
            held.take(len(chunk))
            parts.append(chunk)
        return Encoded(b"".join(parts), kind, param)
