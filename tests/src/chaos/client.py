"""Clients as Python's are: HTTP/1.1, a connection for the watch and one for small requests, each kept and opened anew when
the server has closed it, which is looked at before each request as urllib3 does. Nothing is tried again in secret.

Each lists the configmaps of the namespace `swarm`, watches them, and reads one every now and then. Speaks the lines of the
client-go swarm (tests/go/cmd/swarm, which says what is counted): one a second and when asked; `report`, `reset` and `quit` on
stdin.
"""

import http.client
import json
import os
import random
import select
import ssl
import sys
import threading
import time

address, port, ca, identities, count = sys.argv[1:]
PATH = "/api/v1/namespaces/swarm/configmaps"
HOT = "object-0"
PERIOD, PATIENCE, STALL, KEPT = 2.0, 30.0, 1.0, 10
COUNTED = ["requests", "stalls", "errors", "relists", "watch_breaks", "watch_resumes", "events", "missed", "doubled", "dials"]


class Stats:
    def __init__(self):
        self.lock, self.mark, self.ready, self.texts = threading.Lock(), 0, 0, []
        self.counts = dict.fromkeys(COUNTED, 0)

    def add(self, name, many=1, text=None):
        with self.lock:
            self.counts[name] += many
            if text is not None:
                self.texts = (self.texts + [f"python: {text}"])[-KEPT:]

    def watches(self, more):
        with self.lock:
            self.ready += more

    def say(self, marks=0, anew=False):
        with self.lock:
            self.mark += marks
            if anew:
                self.counts, self.texts = dict.fromkeys(COUNTED, 0), []
            state = {"mark": self.mark, "clients": int(count), "ready": self.ready, "error_texts": self.texts}
            print(json.dumps(state | self.counts), flush=True)


stats = Stats()


class Refused(Exception):
    pass


class Connection:
    def __init__(self, context, timeout):
        self.own = http.client.HTTPSConnection(address, int(port), context=context, timeout=timeout)
        self.socket = None

    def get(self, path):
        kept = self.own.sock
        if kept is not None and select.select([kept], [], [], 0)[0]:
            self.own.close()
        stats.add("requests")
        try:
            self.own.request("GET", path)
            if self.own.sock is not self.socket:
                self.socket = self.own.sock
                stats.add("dials")
            answer = self.own.getresponse()
            if answer.status >= 400:
                raise Refused(f"{answer.status} {answer.read()[:200]!r}")
            return answer
        except Exception:
            self.own.close()
            raise


class Client:
    def __init__(self, index):
        self.context = ssl.create_default_context(cafile=ca)
        stem = os.path.join(identities, f"client-{index}")
        self.context.load_cert_chain(stem + ".crt", stem + ".key")
        self.last, self.version, self.listed = None, None, False

    def reads(self):
        connection = Connection(self.context, PATIENCE)
        while True:
            time.sleep(random.uniform(PERIOD / 2, PERIOD * 3 / 2))
            began = time.monotonic()
            try:
                connection.get(f"{PATH}/{HOT}?resourceVersion=0").read()
                stats.add("stalls", int(time.monotonic() - began > STALL))
            except Exception as error:
                connection.own.close()
                stats.add("errors", text=f"GET: {error!r}")

    def watches(self):
        # Nobody who watches sets a limit to it.
        connection = Connection(self.context, None)
        while True:
            try:
                if self.version is None:
                    self.list(connection)
                self.watch(connection)
            except Exception as error:
                connection.own.close()
                stats.add("errors", text=f"LIST or WATCH: {error!r}")
                time.sleep(1)

    def list(self, connection):
        stats.add("relists", int(self.listed))
        found = json.loads(connection.get(PATH).read())
        self.listed, self.version = True, found["metadata"]["resourceVersion"]
        hot = [one for one in found["items"] if one["metadata"]["name"] == HOT]
        self.last = number(hot[0]) if hot else None

    def watch(self, connection):
        query = f"?watch=1&allowWatchBookmarks=true&timeoutSeconds={random.randint(300, 600)}&resourceVersion={self.version}"
        answer = connection.get(PATH + query)
        stats.watches(1)
        try:
            # The end of the last chunk is a clean end; any other one raises.
            while line := answer.readline():
                if not self.takes(json.loads(line)):
                    break
            stats.add("watch_resumes")
        except Exception as error:
            stats.add("watch_breaks", text=f"watch: {error!r}")
            connection.own.close()
        finally:
            stats.watches(-1)

    def takes(self, event):
        thing = event["object"]
        if event["type"] == "ERROR":
            # Too old, or what it was is not known any more: it is listed anew, and that is counted there.
            self.version = None
            if thing.get("code") != 410:
                stats.add("watch_breaks", text=f"ERROR event: {thing}")
            return False
        self.version = thing["metadata"]["resourceVersion"]
        if event["type"] != "BOOKMARK" and thing["metadata"]["name"] == HOT:
            now = number(thing)
            stats.add("events")
            if self.last is not None and now <= self.last:
                stats.add("doubled")
            elif self.last is not None and now > self.last + 1:
                stats.add("missed", now - self.last - 1)
            self.last = now if self.last is None else max(now, self.last)
        return True


def number(configmap):
    return int((configmap.get("data") or {}).get("number", 0))


def ticks():
    while True:
        time.sleep(1)
        stats.say()


for index in range(int(count)):
    client = Client(index)
    for work in (client.reads, client.watches):
        threading.Thread(target=work, daemon=True).start()
threading.Thread(target=ticks, daemon=True).start()
for command in sys.stdin:
    match command.strip():
        case "report":
            stats.say(marks=1)
        case "reset":
            stats.say(marks=1, anew=True)
        case "quit":
            break
