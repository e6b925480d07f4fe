"""The Hugging Face Hub in memory: what of its client's calls a registry of kernels uses."""

import hashlib
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx2
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError


def answered(status, kind=HfHubHTTPError):
    """Return the client's error for an answer."""
    request = httpx2.Request("POST", "https://hub.example/api")
    return kind(f"status {status}", response=httpx2.Response(status, request=request))


class FakeHub:
    """One repository: the files of every commit."""

    def __init__(self, repo="team/kernels"):
        self.repo = repo
        self.commits = [("0" * 40, {})]
        self.before_commit = lambda: None
        self.failure = None
        self.is_heedless = False
        self._lock = threading.Lock()

    def _files(self, repo_id, revision):
        if self.failure is not None:
            raise self.failure
        if repo_id != self.repo:
            raise answered(404, RepositoryNotFoundError)
        return self.commits[-1][1] if revision == "main" else dict(self.commits)[revision]

    def repo_info(self, repo_id):
        self._files(repo_id, "main")
        return SimpleNamespace(sha=self.commits[-1][0])

    def get_paths_info(self, repo_id, paths, *, revision):
        files = self._files(repo_id, revision)
        return [SimpleNamespace(path=p, size=len(files[p])) for p in paths if p in files]

    def hf_hub_download(self, repo_id, filename, *, revision, local_dir):
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._files(repo_id, revision)[filename])
        return str(path)

    def create_commit(self, repo_id, operations, *, commit_message, parent_commit):
        self.before_commit()
        with self._lock:
            base = parent_commit if self.is_heedless else "main"
            files = {**self._files(repo_id, base)}
            if parent_commit != self.commits[-1][0] and not self.is_heedless:
                raise answered(412)
            for operation in operations:
                if isinstance(operation, CommitOperationAdd):
                    files[operation.path_in_repo] = operation.path_or_fileobj
                else:
                    del files[operation.path_in_repo]
            sha = hashlib.sha1(f"{parent_commit} {commit_message}".encode()).hexdigest()
            self.commits.append((sha, files))
