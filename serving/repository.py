"""The model repository: which versions should be served, and the changes from what is served to that.

Changes come from any thread but the event loop's, one at a time. A version takes another's place only after it was
loaded in full; the other one then answers what waits for it, and is let go.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from serving import bundle as bundles
from serving import loading, memory, version_labels
from serving.catalog import UNLOADED, Catalog, State, Status
from serving.config import ServerConfig
from serving.errors import BundleError, DeviceError, InvalidArgument, NotFound, Unavailable
from serving.loading import ServedModel
from serving.request_queue import Tell, at_once
from serving.version_labels import Labels
from serving.versions import Files, Seen, VersionPolicy, look

__all__ = ["UNLOADED", "Repository", "ServedModel", "State", "Status"]

logger = logging.getLogger(__name__)


class Repository(Catalog):
    """The models that a server serves, from the folder `config.repository`."""

    def __init__(self, config: ServerConfig, tell: Tell = at_once) -> None:
        """Nothing yet.

        Args:
            config: which models and versions, and how they run.
            tell: has callers told of their answers; see `Scheduler`.
        """
        super().__init__()
        self._config = config
        self._tell_callers = tell
        self._policy = VersionPolicy.parse(config.version_policy)
        self._wanted: set[str] = set()  # from the start on; what fails to load later does not make the server unready
        self._retired = False
        self._started = False  # whether everything wanted was tried
        self._closed = False
        self._changing = threading.Lock()  # held to change what is served; ONNX Runtime's sessions need it too
        self._seen: Seen = {}  # at the last look at the folder
        self._tried: dict[tuple[str, int], Files | None] = {}  # the files of a version that is served, or failed
        self._trouble = ""  # why the last look failed
        self._label_troubles: dict[tuple[str, str], list[str]] = {}  # said last, by model, of file or versions

    def scan(self) -> None:
        """Find the versions of every model asked for that the policy selects, and note them as LOADING.

        With `model_control` explicit only the models named are asked for. They may be none, and so may be the
        repository's where models can come later.

        Raises:
            BundleError: there is no repository, it has no model, or not one that was asked for; or it is a model.
        """
        config = self._config
        bundles.check_repository(config.repository)
        self._seen = look(config.repository)
        missing = sorted(set(config.models) - set(self._seen))
        if missing or (config.model_control == "none" and not self._seen):
            what = f"no model {', '.join(missing)}" if missing else "no model"
            have = f"; it has {', '.join(self._seen)}" if self._seen else "; make train puts one into exported/"
            raise BundleError(f"{config.repository}: {what}{have}")
        self._wanted = set(config.models or (() if config.model_control == "explicit" else self._seen))
        for name in self._wanted:
            present = self._seen[name]
            if not self._note_labels(name):
                continue
            labelled = self._labels[name].numbers
            if config.model_control == "poll":  # the others will be complete some day
                complete = {number for number in present if self._is_complete(present[number])}
                selected = self._policy.select(complete, labelled)
            else:
                selected = self._policy.select(present, labelled)
                if not selected:
                    self._note(Status(name, "", State.UNAVAILABLE, self._none_selected(present)))
            for number in selected:
                self._note(Status(name, str(number), State.LOADING))

    def adopt(self, statuses: Iterable[Status], labels: Mapping[str, Labels]) -> None:
        """Instead of `scan`: note as LOADING the versions that another repository serves, newest or not.

        With `model_control` poll the folder says what to serve, as at any time.

        Args:
            statuses: what its `statuses` gave, without what runs there.
            labels: what its `labels` gave.

        Raises:
            BundleError: as `scan`.
        """
        if self._config.model_control == "poll":
            self.scan()
            return
        self._labels = dict(labels)
        for status in statuses:
            ready = status.state is State.READY
            self._note(replace(status, state=State.LOADING, reason="") if ready else status)
        explicit = self._config.model_control == "explicit"
        self._wanted = set(self._config.models or (() if explicit else self._models))

    def load_all(self) -> None:
        """Load every version noted as LOADING; one that may not be served becomes UNAVAILABLE with the reason.

        Raises:
            DeviceError: the device asked for cannot be used.
        """
        for name in sorted({*self._wanted, *self._models}):
            with self._changing:
                for status in self._model(name).statuses.values():
                    if status.state is State.LOADING and not self._closed:  # no client was quicker
                        with contextlib.suppress(BundleError):  # the status has the reason
                            self._load(name, status.number)
                if self._config.model_control == "poll":
                    self._follow(name, self._seen[name], self._seen[name])
                else:
                    self._enforce_labels(name)
        self._started = True

    def load(self, name: str) -> None:
        """Load the versions of a model that the policy selects, also those that are served, and unload its others.

        Raises:
            InvalidArgument: there is no such model, or a version may not be served; what was served in its place goes
                on being served.
            Unavailable: the server is stopping.
        """
        if not bundles.MODEL_NAME.fullmatch(name):
            raise InvalidArgument(f"failed to load '{name}', model name must not contain path traversal characters")
        with self._changing:
            if self._closed:
                raise Unavailable(f"failed to load '{name}', the server is stopping")
            present = bundles.versions(self._config.repository / name)
            if not present:
                raise InvalidArgument(f"failed to load '{name}', failed to poll from model repository")
            if not self._note_labels(name):
                raise InvalidArgument(f"failed to load '{name}', {'; '.join(self._label_troubles[name, 'file'])}")
            selected = sorted(self._policy.select(present, self._labels[name].wanted.values()))
            if not selected:
                raise InvalidArgument(f"failed to load '{name}', {self._none_selected(present)}")
            failures = []
            for number in selected:
                try:
                    self._load(name, number)
                except (BundleError, DeviceError) as error:
                    failures.append(f"version {number}: {error}" if len(selected) > 1 else str(error))
            self._enforce_labels(name)
            self._tidy(name, present)
            memory.give_back()
        if failures:
            raise InvalidArgument(f"failed to load '{name}', {'; '.join(failures)}")

    def unload(self, name: str) -> None:
        """Take a model out of service once the requests that wait for it are answered.

        Raises:
            NotFound: the model was never loaded.
        """
        with self._changing:
            model = self._models.get(name)
            if model is None:
                raise NotFound(f"failed to unload '{name}', the model is not known")
            self._drain(name, model.statuses)
            self._put(name, [Status(name, version, State.UNAVAILABLE, UNLOADED) for version in model.statuses])

    def poll(self) -> bool:
        """Look at the folder, and load and unload what changed in it; whether that changed any status.

        A new or changed version is loaded when a second look finds it complete and as it was. One that fails is not
        tried again before it changes, and those that were served go on being served.
        """
        with self._changing:
            if self._closed:
                return False
            try:
                seen = look(self._config.repository, self._config.models)
            except (BundleError, OSError) as error:
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    logger.warning("cannot look for new versions: %s; what is served goes on being served", error)
                return False
            self._trouble = ""
            statuses = self.statuses()
            before, self._seen = self._seen, seen
            self._tried = {key: files for key, files in self._tried.items() if key[1] in seen.get(key[0], {})}
            for name in sorted({*seen, *before}):
                self._follow(name, seen.get(name, {}), before.get(name, {}))
            if changed := self.statuses() != statuses:
                del statuses  # which hold what was served before
                memory.give_back()
            return changed

    def close(self) -> None:
        """Answer the requests that wait and refuse new ones; a load that runs is waited for."""
        self._closed = True
        with self._changing:
            for model in self._models.values():
                for served in model.served:
                    served.scheduler.close()

    def _follow(self, name: str, present: dict[int, Files], before: dict[int, Files]) -> None:
        """Have a model's versions served that the policy selects of those in the folder that may be served."""
        if not self._note_labels(name) and name not in self._labels:
            return
        labelled = self._labels[name].wanted.values()
        while not self._closed:
            served = self._model(name).numbers
            new = {
                number
                for number, files in present.items()
                if files == before.get(number) and files != self._tried.get((name, number))
            }
            for number in sorted(new):
                if not self._is_complete(present[number]):
                    new.remove(number)
                    self._tried[name, number] = present[number]  # said once
                    logger.warning("model %s version %s is not loaded: it has no %s", name, number, bundles.MANIFEST)
            todo = new & self._policy.select(new | (served & set(present)), labelled)
            if not todo:
                break
            for number in sorted(todo):
                try:
                    self._load(name, number)
                except BundleError:  # the status and the log have the reason
                    pass
                except DeviceError as error:
                    logger.error("model %s version %s is not served: %s", name, number, error)
        coming = [number for number, files in present.items() if self._tried.get((name, number)) != files]
        self._enforce_labels(name, coming)
        self._tidy(name, present)

    def _load(self, name: str, number: int) -> None:
        """Load a version and serve it, in place of itself if it was served before."""
        version = str(number)
        self._tried[name, number] = self._seen.get(name, {}).get(number)
        before = self._model(name).statuses.get(version)
        if before is None or before.served is None:
            self._note(Status(name, version, State.LOADING))
        try:
            served = loading.load(self._config, name, version, self._tell_callers)
        except (BundleError, DeviceError) as error:
            if before and before.served:
                reasons = (before.served.doubt, f"what was loaded goes on being served, since now: {error}")
                self._note(replace(before, reason="; ".join(filter(None, reasons))))
            else:
                self._note(Status(name, version, State.UNAVAILABLE, str(error)))
            raise
        self._note(Status(name, version, State.READY, served.doubt, served))
        if before and before.served:
            before.served.scheduler.close()

    def _note_labels(self, name: str) -> bool:
        """Read a model's labels; whether that worked. Where it did not, those from before stay, and it is logged.

        The first labels of a model are in force at once, changed ones by `_enforce_labels`.
        """
        try:
            wanted = version_labels.read(self._config.repository / name)
        except BundleError as error:
            if name in self._labels:
                self._tell(name, "file", [f"{error}; the labels from before stay in force"])
            else:
                self._tell(name, "file", [str(error)])
                self._note(Status(name, "", State.UNAVAILABLE, str(error)))
            return False
        self._tell(name, "file", [])
        before = self._labels.get(name)
        self._labels[name] = Labels(wanted, before.in_force if before else wanted)
        return True

    def _enforce_labels(self, name: str, coming: Collection[int] = ()) -> None:
        """Have requests answered by the labels that a model has now, as far as their versions are READY.

        What keeps the others is logged, but for versions that are `coming`: a later look may load them.
        """
        if (before := self._labels.get(name)) is None:
            return
        model = self._model(name)
        labels = self._labels[name] = before.enforced(model.numbers)
        if labels != model.labels and model.statuses:
            self._put(name, model.statuses.values())
        for label, number in labels.in_force.items():
            if before.in_force.get(label) != number:
                logger.info("model %s: the label %s means version %s from now on", name, label, number)
        self._tell(name, "versions", labels.troubles({*model.numbers, *coming}))

    def _tell(self, name: str, of: str, troubles: list[str]) -> None:
        """Log what is wrong with a model's labels, once."""
        for trouble in troubles:
            if trouble not in self._label_troubles.get((name, of), ()):
                logger.error("model %s: %s", name, trouble)
        self._label_troubles[name, of] = troubles

    def _tidy(self, name: str, present: Collection[int]) -> None:
        """Unload what the policy selects no more of the versions in the folder, and forget what is not there."""
        served = self._model(name).numbers
        labelled = self._labels[name].numbers
        keep = self._policy.select(served & set(present), labelled)
        if served and not keep and self._policy.select(present, labelled):  # what should be served instead is not
            keep = {max(served)}
        gone = {str(number) for number in served - keep}
        self._drain(name, gone)
        for number in served - keep:
            self._tried.pop((name, number), None)  # the policy may select it again
        left = [
            status
            for status in self._model(name).statuses.values()
            if status.version not in gone and status.reason != UNLOADED and (status.served or status.number in present)
        ]
        if left:
            self._put(name, left)
        else:
            self._drop(name)
            self._labels.pop(name, None)

    def _drain(self, name: str, versions: Collection[str]) -> None:
        """From now on no request reaches these versions of a model; returns when those that wait are answered."""
        statuses = self._model(name).statuses.values()
        leaving = [status for status in statuses if status.served and status.version in versions]
        if not leaving:
            return
        self._put(
            name,
            [Status(name, status.version, State.UNLOADING) if status in leaving else status for status in statuses],
        )
        for status in leaving:
            assert status.served
            status.served.scheduler.close()
            logger.info("model %s version %s unloaded", name, status.version)

    def _note(self, status: Status) -> None:
        known = self._model(status.name).statuses.values()
        self._put(status.name, [*(o for o in known if o.version not in (status.version, "")), status])

    def _is_complete(self, files: Files) -> bool:
        return files.complete(self._config.allow_unverified)

    def _none_selected(self, present: Iterable[int]) -> str:
        have = ", ".join(str(number) for number in sorted(present))
        text = f"--version-policy {self._config.version_policy} selects none of its versions {have}"
        return f"{text}; python -m serving promote gives one a label" if self._policy.kind == "labels" else text

    def index(self) -> list[Status]:
        """As `statuses`, with the models in the repository that were never loaded; reads the folder."""
        statuses = self.statuses()
        known = {status.name for status in statuses}
        with contextlib.suppress(BundleError):  # the folder has gone: what is served is all there is
            names = bundles.models(self._config.repository)
            statuses += [Status(name, "", State.UNAVAILABLE) for name in names if name not in known]
        return sorted(statuses, key=lambda status: status.name)

    def retire(self) -> None:
        """Report not being ready from now on, and go on answering."""
        self._retired = True

    def ready(self) -> bool:
        """Whether every model that should be served is, and those taken out of service since do not count.

        Where nothing will be loaded later, that is every version of it; else one is enough.
        """
        if self._retired:
            return False
        models = [model for name in self._wanted if (model := self._models.get(name)) and not model.unloaded]
        if self._config.model_control == "none":
            return self._started and all(len(model.served) == len(model.statuses) for model in models)
        return self._started and all(model.served for model in models)

    def only_model(self) -> str:
        """The name of the only model.

        Raises:
            InvalidArgument: there are several, or none.
        """
        names = sorted(
            name
            for name, model in self._models.copy().items()
            if model.served or (name in self._wanted and not model.unloaded)
        )
        if len(names) == 1:
            return names[0]
        have = f"want one of: {', '.join(names)}" if names else "and no model is loaded"
        raise InvalidArgument(f"model: got none, {have}")
