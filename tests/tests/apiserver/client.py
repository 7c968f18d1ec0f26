"""A client as Python's are: HTTP/1.1, one connection that is kept and opened again when the server has closed it.

Asks until the file `stop` is there, and then says how much it asked and over how many connections. Whatever fails, or is
not answered with 200, ends it with an error.
"""

import http.client
import json
import os
import ssl
import sys

port, ca, certificate, key, stop, path = sys.argv[1:]


class ByName(ssl.SSLContext):
    """Verifies the name that the certificate is for, at whichever address."""

    def wrap_socket(self, sock, *_, **__):
        return super().wrap_socket(sock, server_hostname="kubernetes.default.svc")


context = ByName(ssl.PROTOCOL_TLS_CLIENT)
context.load_verify_locations(ca)
context.load_cert_chain(certificate, key)
connection = http.client.HTTPSConnection("127.0.0.1", int(port), context=context, timeout=30)
asked, opened, socket = 0, 0, None
while not os.path.exists(stop):
    connection.request("GET", path)
    if connection.sock is not socket:
        socket, opened = connection.sock, opened + 1
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200 or json.loads(body)["kind"] != "ConfigMapList":
        sys.exit(f"request {asked}: {answer.status} {body[:200]!r}")
    asked += 1
print(json.dumps({"asked": asked, "opened": opened}))
