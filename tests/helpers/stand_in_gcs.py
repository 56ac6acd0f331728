"""A stand-in for Google Cloud Storage: what its clients call of the JSON API, in memory.

gcsfs, google-cloud-storage and TensorStore talk to it over HTTP on 127.0.0.1, once `environment`
is in theirs. Written after the API's public reference: objects' insert (media, multipart and
resumable), get (with ranges), list (with prefix, delimiter and pages), delete, moveTo and
rewriteTo, with the preconditions on generations.
"""

import base64
import hashlib
import itertools
import json
import os
import re
import threading
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 3  # objects in a page of a listing: few, so that clients have to ask for more
NO_RIGHT = "Anonymous caller does not have storage.objects.list access to the bucket."


class Object(NamedTuple):
    content: bytes
    generation: int
    updated: str


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status, self.message = status, message


class Gcs:
    """Buckets and who asked for what.

    buckets: names -> objects by their names. closed: names of buckets that nobody has a right to.
    requests: how often each ("READ" or "WRITE", bucket, object) was asked for.
    ranges: how often each (object, first byte, byte after the last) was asked for.
    on_put: called with the bucket and the name of an object before the answer to its writer.
    """

    def __init__(self, *buckets):
        self.buckets = {bucket: {} for bucket in buckets}
        self.closed = set()
        self.requests, self.ranges = Counter(), Counter()
        self.on_put = lambda bucket, name: None
        self.lock = threading.Lock()
        self.uploads = {}
        self._numbers = itertools.count(1_700_000_000_000_000)

    def number(self):
        return next(self._numbers)

    def names(self, bucket, prefix=""):
        """The objects' names that begin so."""
        return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def put(self, bucket, name, content):
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.buckets[bucket][name] = Object(bytes(content), self.number(), stamp)
        self.on_put(bucket, name)

    def put_folder(self, bucket, prefix, folder):
        """The files of a local folder as objects."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(bucket, f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


@contextmanager
def serving(gcs):
    """Serves `gcs`; yields the environment under which clients come here."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"gcs": gcs}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": address,
            # No credentials of this machine, and no looking for them at Google's.
            "CLOUDSDK_CONFIG": os.devnull,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # of TensorStore
            "GCE_METADATA_ROOT": address.removeprefix("http://"),
            "NO_GCE_CHECK": "true",
        }
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # TensorStore opens many connections at once


class _Handler(BaseHTTPRequestHandler):
    gcs: Gcs
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # else an answer's body waits 40 ms for its head to be acknowledged

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:  # gcsfs asks two things at once and drops the slower
            self.close_connection = True

    def _serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        try:
            with self.gcs.lock:
                self._dispatch(url.path, query, body)
        except Refused as error:
            content = {"error": {"code": error.status, "message": error.message}}
            self._answer(error.status, content)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _dispatch(self, path, query, body):
        if path.startswith("/computeMetadata") or path == "/":
            raise Refused(404, "no metadata service")
        match = re.fullmatch(r"/(?:(upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        if match is None:
            raise Refused(501, f"{self.command} {path} is not stood in for")
        kind, bucket, name = match[1], unquote(match[2]), match[3] and unquote(match[3])
        if bucket in self.gcs.closed:
            raise Refused(401, NO_RIGHT)
        if bucket not in self.gcs.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        read = self.command == "GET" and (kind == "download" or query.get("alt") == "media")
        if kind == "upload":
            self._upload(bucket, query, body)
        elif not path.partition("/b/")[2].partition("/")[2]:
            self._answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
        elif name is None:
            self._list(bucket, query)
        elif self.command == "POST":
            self._move(bucket, name)
        elif self.command == "DELETE":
            self._check(bucket, name, query)
            del self._objects(bucket, name)[name]
            self._answer(204)
        elif read:
            self._read(bucket, name, query)
        else:
            self._check(bucket, name, query)
            self._answer(200, self._resource(bucket, name))

    def _objects(self, bucket, name):
        objects = self.gcs.buckets[bucket]
        if name not in objects:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return objects

    def _check(self, bucket, name, query):
        """The preconditions; 0 is the generation of an object that is not there."""
        found = self.gcs.buckets[bucket].get(name)
        generation = 0 if found is None else found.generation
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            raise Refused(304 if self.command == "GET" else 412, "not modified")
        if int(query.get("generation", generation)) != generation:
            raise Refused(404, f"No such object: {bucket}/{name}#{query['generation']}")

    def _resource(self, bucket, name):
        found = self._objects(bucket, name)[name]
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{found.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(found.generation),
            "metageneration": "1",
            "size": str(len(found.content)),
            "timeCreated": found.updated,
            "updated": found.updated,
            "md5Hash": base64.b64encode(hashlib.md5(found.content).digest()).decode(),
        }

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries = {}  # a name, or a prefix up to the delimiter -> whether it is a name
        for name in self.gcs.names(bucket, prefix):
            if not query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                continue
            rest, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            entries[prefix + rest + delimiter if found else name] = not found
        page = min(PAGE, int(query.get("maxResults", PAGE)))
        after = [entry for entry in sorted(entries) if entry > query.get("pageToken", "")]
        here = after[:page]
        content = {
            "kind": "storage#objects",
            "items": [self._resource(bucket, entry) for entry in here if entries[entry]],
            "prefixes": [entry for entry in here if not entries[entry]],
        }
        if len(after) > page:
            content["nextPageToken"] = here[-1]
        self._answer(200, content)

    def _read(self, bucket, name, query):
        self.gcs.requests["READ", bucket, name] += 1
        self._check(bucket, name, query)
        found = self._objects(bucket, name)[name]
        content, headers = found.content, {"x-goog-generation": str(found.generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, content, headers)
            return
        size = len(content)
        start = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        stop = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
        if start >= size:
            raise Refused(416, "The requested range cannot be satisfied.")
        self.gcs.ranges[name, start, stop] += 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._answer(206, content[start:stop], headers)

    def _upload(self, bucket, query, body):
        if "upload_id" in query:
            self._chunk(bucket, query, body)
            return
        name, kind = query.get("name"), query["uploadType"]
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])[1].encode()
            _, head, rest = body.split(b"--" + boundary, 2)
            metadata = re.split(rb"\r?\n\r?\n", head, maxsplit=1)[1]
            name = json.loads(metadata)["name"]
            content = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[1]
            body = re.sub(rb"\r?\n--" + re.escape(boundary) + rb"--\s*\Z", b"", content)
        if kind == "resumable":
            self.gcs.uploads[key := str(self.gcs.number())] = b""
            where = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o"
            session = f"{where}?uploadType=resumable&name={name}&upload_id={key}"
            self._answer(200, {}, {"Location": session})
            return
        self._check(bucket, name, query)
        self._write(bucket, name, body)

    def _chunk(self, bucket, query, body):
        key, name = query["upload_id"], query["name"]
        if self.command == "DELETE":
            del self.gcs.uploads[key]
            self._answer(499)
            return
        self.gcs.uploads[key] += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        done = len(self.gcs.uploads[key])
        if total == "*" or done < int(total):
            self._answer(308, b"", {"Range": f"bytes=0-{done - 1}"})
            return
        self._write(bucket, name, self.gcs.uploads.pop(key))

    def _write(self, bucket, name, content):
        self.gcs.requests["WRITE", bucket, name] += 1
        self.gcs.put(bucket, name, content)
        self._answer(200, self._resource(bucket, name))

    def _move(self, bucket, name):
        match = re.fullmatch(r"(.+)/(?:moveTo|rewriteTo/b/([^/]+))/o/(.+)", name)
        source, target, new = match[1], match[2] or bucket, match[3]
        objects = self._objects(bucket, source)
        self.gcs.put(target, new, objects[source].content)
        resource = self._resource(target, new)
        if match[2]:
            self._answer(200, {"done": True, "resource": resource})
        else:
            del objects[source]
            self._answer(200, resource)

    def _answer(self, status, content=b"", headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 304:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)
