"""A chat endpoint on this machine that answers, or misbehaves, as a test says."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """A chat endpoint that answers as `behave(number of the request, request)` says: (status, body), "closed", or
    seconds that a good answer takes to begin, or under "drip" to be sent, byte by byte."""

    def __init__(self):
        self.requests, self.paths, self.headers, self.behave = [], [], [], lambda number, request: good(8, 9)
        self.at_a_time, self.most_at_a_time, self.retry_after = 0, 0, None
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(request)
                    outer.paths.append(self.path)
                    outer.headers.append(dict(self.headers))
                    outer.at_a_time += 1
                    outer.most_at_a_time = max(outer.most_at_a_time, outer.at_a_time)
                try:
                    self.answer(outer.behave(number, request))
                except OSError:
                    pass  # who asked has gone
                finally:
                    with lock:
                        outer.at_a_time -= 1

            def answer(self, what):
                if what == "closed":
                    self.connection.close()
                    return
                if isinstance(what, float):
                    time.sleep(what)
                    what = good(8, 9)
                seconds = 0.0
                if what[0] == "drip":
                    seconds, what = what[1], good(8, 9)
                status, body = what
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if outer.retry_after is not None:
                    self.send_header("Retry-After", outer.retry_after)
                self.end_headers()
                size = 1 if seconds else max(1, len(body))
                for start in range(0, len(body), size):
                    self.wfile.write(body[start : start + size])
                    time.sleep(seconds / len(body))

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def good(*scores):
    return completion(f'Here it is: {{"scores": {list(scores)}, "reason": "so"}}')
